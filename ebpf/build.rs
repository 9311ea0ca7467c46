//! Tells aya-ebpf which machine's registers the programs will see.

fn main() {
    if let Err(error) = aya_build::emit_bpf_target_arch_cfg() {
        println!("cargo::error=emitting the bpf target architecture: {error:#}");
    }
}
