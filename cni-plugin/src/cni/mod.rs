//! The CNI protocol: environment, configuration, result, errors and dispatch.
//!
//! What a runtime says to the plugin is parsed and validated here, and what the
//! plugin answers is written here, in the version of the specification that the
//! configuration names. Nothing in this module knows of Linux: the work itself
//! is behind [`dispatch::Plugin`].
//!
//! Specification: <https://github.com/containernetworking/cni/blob/v1.3.0/SPEC.md>,
//! cited below as "spec". Where it leaves something open, the plugin does what
//! libcni and skel, its reference implementation, do.

pub mod config;
pub mod dispatch;
pub mod env;
pub mod error;
pub mod exec;
pub mod json;
pub mod names;
pub mod ports;
pub mod result;
pub mod version;

pub use config::NetworkConfig;
pub use dispatch::{Call, Plugin};
pub use env::{Command, Invocation};
pub use error::{CniError, ErrorCode};
pub use names::AttachmentId;
pub use ports::{HostIp, PortMapping, Protocol};
pub use result::CniResult;
pub use version::SpecVersion;
