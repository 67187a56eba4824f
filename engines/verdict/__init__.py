"""The verdict on int8: accuracy compared with fp32, speed, and a report."""
