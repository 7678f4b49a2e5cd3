"""The trainer on several processes: measured, and predicted."""
