"""The live page: a server that shows the state of a project in browsers, with buttons for some commands.

`reading` reads the queue once for all pages, `figures` caches the report's figures, `acts` handles the buttons,
`access` checks requests, `pages` combines these into a Starlette application, and `serving` runs it in a terminal or
beside a notebook. Needs `pip install 'mbqueue[board]'`.
"""
