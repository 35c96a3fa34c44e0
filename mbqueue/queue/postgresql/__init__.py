"""The queue on a PostgreSQL server, for sessions on several machines. psycopg is imported when one is opened."""
