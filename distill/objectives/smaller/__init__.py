"""Objectives of students that are not their teacher's copy: smaller ones, and parts beside it."""
