//! A sandbox with one attachment.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Deref,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{Attachment, Network, Sandbox};

/// A sandbox that is attached to a network, and what ADD said of it.
///
/// Dropping it takes away the sandbox but calls no DEL.
#[derive(Debug)]
pub struct Pod {
    sandbox: Sandbox,
    attachment: Attachment,
    result: Value,
}

impl Network<'_> {
    /// Makes a sandbox and attaches it as `eth0`.
    ///
    /// # Errors
    ///
    /// The plugin's error.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let sandbox = self.node().sandbox(name)?;
        let attachment = sandbox.attachment();
        self.pod_with(sandbox, attachment)
    }

    /// As [`Self::pod`], with ports to publish: the capability `portMappings`.
    ///
    /// # Errors
    ///
    /// The plugin's error.
    pub fn pod_with_ports(&self, name: &str, ports: Value) -> Result<Pod> {
        let sandbox = self.node().sandbox(name)?;
        let attachment = sandbox.attachment().capability("portMappings", ports);
        self.pod_with(sandbox, attachment)
    }

    /// Attaches a sandbox with arguments of the caller's.
    ///
    /// # Errors
    ///
    /// The plugin's error.
    pub fn pod_with(&self, sandbox: Sandbox, attachment: Attachment) -> Result<Pod> {
        let result = self.add(&attachment)?;
        Ok(Pod {
            sandbox,
            attachment,
            result,
        })
    }
}

impl Pod {
    /// What DEL and CHECK need.
    #[must_use]
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// The result of ADD.
    #[must_use]
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// The addresses that ADD assigned, in the order of the result (of
    /// version 0.3.0 or later).
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect()
    }

    /// The first IPv4 address.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub fn v4(&self) -> Result<Ipv4Addr> {
        self.addresses()
            .into_iter()
            .find_map(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            })
            .with_context(|| format!("no IPv4 address in {}", self.result))
    }

    /// The first IPv6 address.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub fn v6(&self) -> Result<Ipv6Addr> {
        self.addresses()
            .into_iter()
            .find_map(|address| match address {
                IpAddr::V6(address) => Some(address),
                IpAddr::V4(_) => None,
            })
            .with_context(|| format!("no IPv6 address in {}", self.result))
    }

    /// The host's end of the veth pair: the interface of the result that is in
    /// no sandbox and is not the network's gateway device.
    ///
    /// # Errors
    ///
    /// That the result names none.
    pub fn host_veth(&self) -> Result<&str> {
        self.result["interfaces"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|interface| interface["sandbox"].as_str().unwrap_or("").is_empty())
            .filter_map(|interface| interface["name"].as_str())
            .find(|name| name.starts_with("veth"))
            .with_context(|| format!("no host veth in {}", self.result))
    }
}

impl Deref for Pod {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}
