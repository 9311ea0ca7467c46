//! bpf-bridge: the bridge network, without the bridge.

pub mod cni;
pub mod ipam;
pub mod link;
pub mod netns;
