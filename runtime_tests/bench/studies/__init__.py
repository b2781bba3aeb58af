"""What a recipe or a detour loses: commands that judge files by their logits and write pages; nothing is timed."""
