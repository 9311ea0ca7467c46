//! bpf-bridge: the bridge network, without the bridge.

pub mod attachment;
pub mod cni;
pub mod datapath;
pub mod ipam;
pub mod link;
pub mod lock;
pub mod netns;
