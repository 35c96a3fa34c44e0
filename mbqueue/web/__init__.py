"""The board: a web server that shows the state of a project, with buttons for some commands.

`reading` reads the queue once for all pages, `figures` caches the report's figures, `acts` performs the actions of
buttons, and `access` checks requests. `pages` combines these modules into a Starlette application. `serving` runs the
application in a terminal or in a notebook. Requires: pip install 'mbqueue[board]'
"""
