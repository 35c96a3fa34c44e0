"""The board: a web server that shows the state of a project, with buttons for some commands.

`reading` reads the queue once for all pages, `figures` caches the report's figures, `acts` performs the actions of
buttons, and `access` checks requests. `pages` is the Starlette application, and `serving` runs it in a terminal or in a
notebook. Requires: pip install 'mbqueue[board]'
"""
