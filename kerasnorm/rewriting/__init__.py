"""The main job: plan, apply, report, export."""
