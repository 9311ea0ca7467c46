//! STATUS: whether an ADD would succeed, and whether those that did still hold.

use std::{thread, time::Duration};

use crate::{
    attachment::{self, Attachment, Record},
    cni::{Call, CniError, ErrorCode},
    datapath::{self, Datapath, FILTER_HANDLE, FILTER_PRIORITY},
    gateway,
    ipam::Ipam,
    link::{Hook, Netlink},
    uplinks,
};

use super::is_alive;

/// How often a pod is looked at before it is said to suffer, and how long after each other.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// Answers with the first reason why not: 51 if attached pods suffer from it, 50
/// if only new ones would.
pub(super) fn run(call: &Call<'_>) -> Result<(), CniError> {
    let host = Netlink::host()?;
    // What came to the node since is not their fault.
    if let Ok(Some(datapath)) = Datapath::open() {
        uplinks::follow(&host, &datapath, call.config, || {
            attachment::outside(&call.config.name)
        })?;
    }
    attached(call, &host)?;
    ready(call, &host)?;
    Ipam::of(call).status(call, &|other| is_alive(&host, other).unwrap_or(true))
}

/// The programs can be used, or could be loaded, and nobody has the bridge's name.
fn ready(call: &Call<'_>, host: &Netlink) -> Result<(), CniError> {
    let unavailable =
        |error: datapath::Error| CniError::new(ErrorCode::NotAvailable, error.to_string());
    datapath::require_bpffs().map_err(unavailable)?;
    let datapath = Datapath::open().map_err(unavailable)?;
    if datapath.is_none() {
        datapath::verify().map_err(unavailable)?;
    }
    gateway::check(host, datapath.as_ref(), &call.config.bridge)
        .map_err(|error| CniError::new(ErrorCode::NotAvailable, error.to_string()))
}

/// Every pod of the network has its program and its entries.
fn attached(call: &Call<'_>, host: &Netlink) -> Result<(), CniError> {
    let mut opened = None;
    for (container_id, ifname) in attachment::recorded(&call.config.name)? {
        let attachment = Attachment {
            network: &call.config.name,
            container_id: &container_id,
            ifname: &ifname,
        };
        let Some(record) = attachment.peek().filter(|record| record.complete) else {
            continue;
        };
        // A pod whose sandbox is gone suffers from nothing.
        if !is_alive(host, &attachment)? {
            continue;
        }
        let mut looks = 1;
        while let Err(fault) = suffers(host, &mut opened, &attachment, &record) {
            // Nor does one that goes, or whose name comes again, while it is looked at: nobody
            // is locked out here, and an ADD makes its device before it writes a record.
            if !is_alive(host, &attachment)? || attachment.peek().as_ref() != Some(&record) {
                break;
            }
            if looks == LOOKS {
                return Err(fault);
            }
            looks += 1;
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// What a pod suffers from, if from anything.
fn suffers(
    host: &Netlink,
    opened: &mut Option<Datapath>,
    attachment: &Attachment<'_>,
    record: &Record,
) -> Result<(), CniError> {
    let datapath = match opened {
        Some(datapath) => datapath,
        none => none.insert(open()?),
    };
    if let Some(fault) = super::check::port(host, datapath, attachment, record)? {
        return Err(degraded(fault));
    }
    if let Some(fault) = super::check::translation(datapath, record)? {
        return Err(degraded(fault));
    }
    let carried = match datapath.segment(record.segment)? {
        Some(gateway) => host.tc_bpf(
            gateway.gateway_port,
            Hook::Ingress,
            FILTER_PRIORITY,
            FILTER_HANDLE,
        )?,
        None => None,
    };
    if carried.is_none() {
        return Err(degraded(format!(
            "the gateway port of bridge {:?} has lost its program or was deleted",
            record.bridge
        )));
    }
    Ok(())
}

/// The maps that the attached pods need.
fn open() -> Result<Datapath, CniError> {
    match Datapath::open() {
        Ok(Some(datapath)) => Ok(datapath),
        Ok(None) => Err(degraded(format!(
            "pods are attached, but the maps that were pinned for them below {} are gone",
            datapath::BPFFS
        ))),
        // Attached pods are served by what the newer version has made.
        Err(error @ datapath::Error::Newer { .. }) => {
            Err(CniError::new(ErrorCode::NotAvailable, error.to_string()))
        }
        Err(error) => Err(degraded(error.to_string())),
    }
}

fn degraded(what: String) -> CniError {
    CniError::new(ErrorCode::LimitedConnectivity, what)
}
