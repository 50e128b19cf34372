"""report.html: a page from the files of a run directory, complete or not.

reading.py (files; untrusted.py keeps their usable values) → record.py (`Record`; grids.py: modules by layer) →
charts.py (charts as plain data) → svg.py (inline in the page), plots.py (PNGs, by matplotlib) → page.py (the page; its
rank_section.py and data_section.py, in markup.py's HTML).  Nothing here needs torch or transformers, and no file that
is missing, torn or of another shape stops it: a part without data says so.
"""

from sora_llm.report_page.page import write_page, write_report
from sora_llm.report_page.reading import read_record
from sora_llm.report_page.record import Record

__all__ = ["Record", "read_record", "write_page", "write_report"]
