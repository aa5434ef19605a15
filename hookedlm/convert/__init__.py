"""From a Hugging Face module to uniform layers: read, build, check, report.

The only place that may reach into Hugging Face's objects by name.
"""
