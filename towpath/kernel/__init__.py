"""The only folder that touches the kernel: it applies plans and reads what is there."""
