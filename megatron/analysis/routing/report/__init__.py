"""The routing report: a page that needs no network, and a PNG of every figure. A file for each section."""

from megatron.analysis.routing.report.report import report_page, write_report

__all__ = ["report_page", "write_report"]
