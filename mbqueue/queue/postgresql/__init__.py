"""The queue on a PostgreSQL server, for sessions on several machines. This package requires psycopg."""
