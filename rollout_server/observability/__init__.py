"""What a server tells of itself: metrics, logs, events, a report. It observes, and runs nothing."""
