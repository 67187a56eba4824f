"""Load test of ``tap-export serve`` over the loopback interface: throughput, overload, attacks."""
