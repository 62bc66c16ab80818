"""The report of a study: one self-contained HTML file, written by `page.write_report`."""
