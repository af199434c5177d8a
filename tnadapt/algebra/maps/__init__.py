"""The fixed maps F that follow the network, their adjoints and slices, and the Walsh-Hadamard transform."""
