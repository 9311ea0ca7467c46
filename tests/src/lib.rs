//! Nodes, pods and the plugin binary, for tests, the demo and the benchmark.
