"""Figures of the report, drawn by Bokeh (extra ``report``): one module each."""
