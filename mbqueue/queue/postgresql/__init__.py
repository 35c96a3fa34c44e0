"""The queue on a PostgreSQL server, for sessions on several machines. Opening such a queue imports psycopg."""
