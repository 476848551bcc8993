"""The hook on a running pruner: it registers, steers, records, syncs and reports."""
