"""The verdict on int8: accuracy beside fp32, speed, and a report."""
