"""The bill before the job: time, bytes, money."""
