"""The parts of an attachment beside its wire, each as plans: ports, masquerade, isolation, bandwidth, tuning."""
