"""The native kernels for the CPU: C++ that is compiled at first use and registers itself under the operators' names."""
