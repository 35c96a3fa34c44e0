"""The live page: one process that serves the state of a project to browsers, and acts as the command line does.

`reading` reads the queue for all pages at once, `figures` keeps the report's figures, `acts` are the buttons,
`access` decides who may ask, `pages` puts these together as a Starlette application, and `serving` runs it in a
terminal or beside a notebook. Needs `pip install 'mbqueue[board]'`.
"""
