"""The study's report: `write_report(path, summary, runs, traces)` makes one self-contained HTML file.

evidence.py  what the study's files say, as plain numbers (one function a figure or table)
figures.py   those numbers as plotly figures
cards.py     the headline, the verdicts and their small interval plots
page.py      the page: report.html, report.css and report.js filled in and written
"""

from .page import write_report

__all__ = ["write_report"]
