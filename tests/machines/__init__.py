"""Several machines: network namespaces of one machine, each with its own address and host name."""
