"""Snakemake with what happens as lines of JSON, on a file descriptor.

    python .ci/engine.py --logger events --logger-events-fd 3 ...

is `snakemake ...` with a logger plugin of its own. A line is
{"event": NAME, ...}: a job's `log` and `output` and, where it failed, the `reason`; of
steps, `done` and `total`; of an error outside a job, its `text`.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase

JOB = {"log": "log", "output": "output", "rule_name": "rule"}
FIELDS = {
    LogEvent.JOB_INFO: JOB,
    LogEvent.JOB_ERROR: JOB | {"rule_msg": "reason"},
    LogEvent.PROGRESS: {"done": "done", "total": "total"},
    LogEvent.ERROR: {},
}


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    """Options of the command line, as `--logger-events-...`."""

    fd: int = field(default=1, metadata={"help": "file descriptor that lines go to"})


class LogHandler(LogHandlerBase):
    """Writes a line for each event of `FIELDS`, with the fields that a reader needs."""

    writes_to_stream = writes_to_file = needs_rulegraph = False
    has_filter = has_formatter = True

    def emit(self, record):
        event = getattr(record, "event", None)
        if event not in FIELDS:
            return
        values = {new: getattr(record, old) for old, new in FIELDS[event].items()}
        if event == LogEvent.ERROR:
            values["text"] = record.getMessage()
        line = json.dumps({"event": str(event), **values}, default=str) + "\n"
        try:
            os.write(self.settings.fd, line.encode())
        except OSError:  # nobody listens any more
            pass


if __name__ == "__main__":
    from snakemake.cli import main
    from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

    # as `python -m snakemake` would: the `lib` of this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    this = sys.modules[__name__]
    LoggerPluginRegistry().register_plugin("snakemake_logger_plugin_events", this)
    main()
