"""The report of a recorded experiment: one HTML file that needs nothing but a browser.

`analysis` computes, `figures` draws with plotly, `page` puts the file together. Heavy (plotly): import it only where
a report is asked for.
"""
