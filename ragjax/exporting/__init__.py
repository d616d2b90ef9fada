"""A run's models as folders that other libraries load. Table of contents of the room."""

from ragjax.exporting.export import export_run

__all__ = ["export_run"]
