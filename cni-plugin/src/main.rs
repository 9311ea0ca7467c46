//! The `bpf-bridge` binary: the only place that touches the environment, stdin,
//! stdout and the exit code.

fn main() {}
