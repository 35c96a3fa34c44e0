"""The report of a recorded experiment: one HTML file that needs nothing but a browser.

`analysis` computes, `figures` draws with plotly, and `page` assembles the file. plotly is slow to import, so import
this package only to write a report.
"""
