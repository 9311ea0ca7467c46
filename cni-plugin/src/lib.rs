//! bpf-bridge: the bridge network, without the bridge.
//!
//! A runtime calls the binary; [`cni`] turns the environment and stdin into a
//! call, [`commands`] does it, and [`cni`] writes the answer. Everything else is a
//! module for one resource:
//!
//! | module | what it is for |
//! |---|---|
//! | [`cni`] | the protocol: environment, configuration, result, errors, versions |
//! | [`commands`] | the verbs, one file each: the order of the work and its undoing |
//! | [`attachment`] | the names of an attachment, its record and its lock |
//! | [`ipam`] | addresses: the embedded store, or another plugin |
//! | [`netns`] | network namespaces |
//! | [`link`] | devices, addresses, routes, sockets and settings, through netlink and procfs |
//! | [`gateway`] | the gateway port, by which the host takes part in a segment |
//! | [`ports`] | published ports: who claims what |
//! | [`masquerade`] | what pods send out of the node leaves with the node's address |
//! | [`uplinks`] | the node's addresses, and its devices toward others |
//! | [`datapath`] | the eBPF programs and their maps, from the plugin's side |
//! | [`fault`] | where tests kill a call, or make it fail |
//! | [`follow`] | `bpf-bridge log`: what the programs write to their log |
//! | [`node`] | the node's settings: the limits of all tables |
//! | [`upgrade`] | `bpf-bridge upgrade`: other programs for the pods that are attached |
//! | [`lock`] | file locks |
//! | [`boot`] | which boot and which network namespace this is |
//! | [`mount`] | file systems that nobody else sees |
//! | [`mac`] | Ethernet addresses |
//!
//! [`commands::add`] is the place to begin reading; the programs are in the
//! package `bpf-bridge-ebpf`.

pub mod attachment;
pub mod boot;
pub mod cni;
pub mod commands;
pub mod datapath;
pub mod fault;
pub mod follow;
pub mod gateway;
pub mod ipam;
pub mod link;
pub mod lock;
pub mod mac;
pub mod masquerade;
pub mod mount;
pub mod netns;
pub mod node;
pub mod ports;
pub mod upgrade;
pub mod uplinks;
