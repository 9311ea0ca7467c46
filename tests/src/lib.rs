//! Nodes, pods and the plugin binary, for the tests, the demo and the
//! benchmark.
//!
//! A [`Node`] is a network and a mount namespace with nothing of the machine's
//! in it that a plugin could harm. It runs [`Sandbox`]es (what a runtime makes
//! for a pod) and may have a neighbour, the [`Outside`]. A [`Network`] is a
//! conflist, and calls the plugins in it exactly as libcni does; [`Call`] is
//! one call of one plugin with every variable in the caller's hands. A
//! [`Snapshot`] tells what is on a node, so that two of them tell what was left
//! behind.
//!
//! Everything lives in the process that made it: namespaces are held open by
//! file descriptors alone and vanish with them, however the process ends. No
//! name, directory or device of the machine is touched, so any number of nodes
//! may exist side by side. The one thing outside of them is a cgroup that the
//! process moves to, for the nodes to see as the root; it is removed after the
//! process's end.
//!
//! The network is set up with `ip` on purpose: the harness must not share code
//! with what it tests.

mod another;
mod cgroup;
mod ip;
mod namespace;
mod node;
mod packet;
mod patient;
mod plugin;
mod pod;
mod raw;
mod snapshot;
pub mod storm;
mod tables;
mod traffic;
mod tunnel;

pub use another::another_build;
pub use ip::{Packet, internet_checksum};
pub use namespace::{Namespace, Offload, Process, wait_for};
pub use node::{Far, Node, Outside, Sandbox};
pub use packet::{Captured, Frame, MacAddr, PacketSocket};
pub use patient::{Receive, ReceiveFrom};
pub use plugin::{Attachment, Call, CniError, Network, Reply, Verb, faults_binary, plugin_binary};
pub use pod::Pod;
pub use raw::RawSocket;
pub use snapshot::Snapshot;
pub use tables::{Tables, at_once};
pub use traffic::{Client, EchoServer, Meeting, TransferReport, digest, when_free};
pub use tunnel::{Joined, Tunnel};
