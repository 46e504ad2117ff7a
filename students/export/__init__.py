"""A finished student as files: a diffusers folder, LoRA files, single files."""

from students.export.folder import ExportError, export, load_student

__all__ = ["ExportError", "export", "load_student"]
