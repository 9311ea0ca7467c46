//! Address management: our own store for `host-local`, or another plugin.

pub mod host_local;

use std::{net::IpAddr, path::PathBuf};

use serde_json::Value;

use crate::{
    attachment::Attachment,
    cni::{AttachmentId, Call, CniError, CniResult, Command, ErrorCode, result::IpConfig},
};

use host_local::{Config, ConfigError, Owner, Requests, Store, StoreError};

/// The IPAM plugin that is served in process.
const HOST_LOCAL: &str = "host-local";

/// Who manages a network's addresses.
#[derive(Debug)]
pub enum Ipam<'a> {
    /// Nobody: the network has none.
    None,
    /// The embedded store, in `host-local`'s format; with the `ipam` object.
    HostLocal(&'a Value),
    /// The plugin of this name, executed.
    Delegated(&'a str),
}

impl<'a> Ipam<'a> {
    /// What the configuration asks for.
    pub fn of(call: &Call<'a>) -> Self {
        match call.config.ipam_type.as_deref() {
            None => Self::None,
            Some(HOST_LOCAL) => Self::HostLocal(&call.config.ipam),
            Some(name) => Self::Delegated(name),
        }
    }

    /// Reserves addresses for the attachment. `alive` tells whether another
    /// attachment of the network exists; the addresses of those that do not may
    /// be taken.
    ///
    /// # Errors
    ///
    /// [`del`](Self::del) must follow: something may have been reserved.
    pub fn add(
        &self,
        call: &Call<'_>,
        attachment: &Attachment<'_>,
        alive: &dyn Fn(&Attachment<'_>) -> bool,
    ) -> Result<CniResult, CniError> {
        match self {
            Self::None => Ok(CniResult::default()),
            Self::Delegated(name) => call.delegate(name)?.add(),
            Self::HostLocal(ipam) => {
                let config = parse(call, ipam)?;
                let store =
                    Store::open(&config.data_dir, attachment.network).map_err(store_error)?;
                let lease = store
                    .allocate(owner(attachment), &config, &|other: Owner<'_>| {
                        alive(&Attachment {
                            network: attachment.network,
                            container_id: other.container_id,
                            ifname: other.ifname,
                        })
                    })
                    .map_err(store_error)?;
                let dns = config.dns().map_err(config_error)?;
                Ok(CniResult {
                    ips: lease
                        .allocations
                        .iter()
                        .map(|allocation| IpConfig {
                            gateway: allocation.gateway,
                            ..IpConfig::new(allocation.address)
                        })
                        .collect(),
                    routes: config.routes,
                    dns,
                    ..CniResult::default()
                })
            }
        }
    }

    /// Gives the attachment's addresses back; that it has none is no error.
    ///
    /// # Errors
    ///
    /// What could not be given back.
    pub fn del(&self, call: &Call<'_>, attachment: &Attachment<'_>) -> Result<(), CniError> {
        match self {
            Self::None => Ok(()),
            Self::Delegated(name) => call.delegate(name)?.call(Command::Del),
            Self::HostLocal(ipam) => match open(ipam, attachment.network)? {
                Some(store) => store
                    .release(owner(attachment))
                    .map(drop)
                    .map_err(store_error),
                None => Ok(()),
            },
        }
    }

    /// Checks that the attachment's addresses are reserved for it.
    ///
    /// # Errors
    ///
    /// They are not.
    pub fn check(
        &self,
        call: &Call<'_>,
        attachment: &Attachment<'_>,
        addresses: &[IpAddr],
    ) -> Result<(), CniError> {
        match self {
            Self::None => Ok(()),
            Self::Delegated(name) => call.delegate(name)?.call(Command::Check),
            Self::HostLocal(ipam) => {
                let reserved = match open(ipam, attachment.network)? {
                    Some(store) => store.check(owner(attachment)).map_err(store_error)?,
                    None => Vec::new(),
                };
                match addresses.iter().find(|address| !reserved.contains(address)) {
                    None => Ok(()),
                    Some(lost) => Err(CniError::new(
                        ErrorCode::Internal,
                        format!(
                            "address {lost} of {} {} is not reserved for it: its leases are {reserved:?}",
                            attachment.container_id, attachment.ifname
                        ),
                    )),
                }
            }
        }
    }

    /// Gives back the addresses of all attachments but the valid ones.
    ///
    /// # Errors
    ///
    /// What could not be given back.
    pub fn gc(&self, call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError> {
        match self {
            Self::None => Ok(()),
            Self::Delegated(name) => call.delegate(name)?.call(Command::Gc),
            Self::HostLocal(ipam) => {
                let Some(store) = open(ipam, &call.config.name)? else {
                    return Ok(());
                };
                let valid: Vec<_> = valid
                    .iter()
                    .map(|id| Owner {
                        container_id: &id.container_id,
                        ifname: &id.ifname,
                    })
                    .collect();
                store.collect_garbage(&valid).map(drop).map_err(store_error)
            }
        }
    }

    /// Tells whether an ADD would get its addresses.
    ///
    /// # Errors
    ///
    /// It would not.
    pub fn status(
        &self,
        call: &Call<'_>,
        alive: &dyn Fn(&Attachment<'_>) -> bool,
    ) -> Result<(), CniError> {
        match self {
            Self::None => Ok(()),
            Self::Delegated(name) => call.delegate(name)?.call(Command::Status),
            Self::HostLocal(ipam) => {
                let config = parse(call, ipam)?;
                let network = &call.config.name;
                let Some(store) =
                    Store::open_existing(&config.data_dir, network).map_err(store_error)?
                else {
                    return Ok(());
                };
                store
                    .check_free(&config, &|other: Owner<'_>| {
                        alive(&Attachment {
                            network,
                            container_id: other.container_id,
                            ifname: other.ifname,
                        })
                    })
                    .map_err(|error| CniError::new(ErrorCode::NotAvailable, error.to_string()))
            }
        }
    }
}

fn parse(call: &Call<'_>, ipam: &Value) -> Result<Config, CniError> {
    let requested: Vec<String> = call.args.ips.iter().map(IpAddr::to_string).collect();
    let requested = requested.join(",");
    let requests = Requests::from_network(
        &call.config.raw,
        Some(requested.as_str()).filter(|ips| !ips.is_empty()),
    );
    Config::parse(ipam, requests, &call.config.cni_version.to_string()).map_err(config_error)
}

fn open(ipam: &Value, network: &str) -> Result<Option<Store>, CniError> {
    let directory: PathBuf = host_local::data_dir(ipam).map_err(config_error)?;
    Store::open_existing(&directory, network).map_err(store_error)
}

fn owner<'a>(attachment: &Attachment<'a>) -> Owner<'a> {
    Owner {
        container_id: attachment.container_id,
        ifname: attachment.ifname,
    }
}

fn config_error(error: ConfigError) -> CniError {
    CniError::new(ErrorCode::InvalidConfig, error.to_string())
}

fn store_error(error: StoreError) -> CniError {
    match error {
        StoreError::Lock(error) => error.into(),
        error => CniError::new(ErrorCode::Internal, error.to_string()),
    }
}
