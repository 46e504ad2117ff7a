"""The student follows the teacher's paths: consistency and progressive distillation."""
