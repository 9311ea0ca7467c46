//! Masquerade: what pods send out of the node leaves with the node's address.

use ipnet::IpNet;

use crate::{
    attachment::Record,
    cni::{CniError, NetworkConfig, config::MasqBackend, result::IpConfig},
    datapath::{self, Datapath, nat::Policy},
    link::Netlink,
    uplinks,
};

/// What masquerades an attachment with these addresses, if anything does.
pub fn wanted(config: &NetworkConfig, ips: &[IpConfig]) -> Option<MasqBackend> {
    config.ip_masq.filter(|_| !ips.is_empty())
}

/// The destinations for which it is not masqueraded: its own subnets, and those that the
/// configuration lists.
fn exempt(config: &NetworkConfig, ips: &[IpConfig]) -> impl Iterator<Item = IpNet> {
    ips.iter()
        .map(|ip| ip.address)
        .chain(config.ip_masq_exempt.iter().copied())
}

/// Masquerades an attachment, whose record names it already.
///
/// # Errors
///
/// One of its addresses is another pod's, or an uplink cannot be served.
pub fn begin(
    host: &Netlink,
    datapath: &Datapath,
    config: &NetworkConfig,
    record: &Record,
    ips: &[IpConfig],
) -> Result<(), CniError> {
    if record.masquerade != Some(MasqBackend::Ebpf) {
        return Ok(());
    }
    let Some(mut nat) = datapath.nat()? else {
        return Ok(());
    };
    uplinks::serve(host, &mut nat, config, record.outside())?;
    let policy = Policy::new(exempt(config, ips));
    for &address in &record.addresses {
        loop {
            let claimed = nat.masquerade(address, record.segment, &policy, record.host_ifindex);
            match claimed {
                // Its sandbox went without a DEL.
                Err(datapath::Error::Assigned { port: owner, .. })
                    if host.link_by_index(owner)?.is_none() =>
                {
                    nat.unmasquerade(address, record.segment, owner)?;
                }
                claimed => break claimed?,
            }
        }
    }
    Ok(())
}

/// Ends that.
///
/// # Errors
///
/// The tables cannot be used.
pub fn end(datapath: &Datapath, record: &Record) -> Result<(), datapath::Error> {
    if record.masquerade != Some(MasqBackend::Ebpf) {
        return Ok(());
    }
    let Some(mut nat) = datapath.nat()? else {
        return Ok(());
    };
    for &address in &record.addresses {
        nat.unmasquerade(address, record.segment, record.host_ifindex)?;
    }
    Ok(())
}

/// What is wrong with an attachment's masquerade, if anything is.
///
/// # Errors
///
/// The tables cannot be read.
pub fn check(datapath: &Datapath, record: &Record) -> Result<Option<String>, CniError> {
    if record.masquerade != Some(MasqBackend::Ebpf) {
        return Ok(None);
    }
    let Some(nat) = datapath.nat()? else {
        return Ok(Some(
            "the programs that masquerade are not loaded".to_owned(),
        ));
    };
    for &address in &record.addresses {
        if nat.masqueraded(address, record.segment)? != Some(record.host_ifindex) {
            return Ok(Some(format!("{address} is not masqueraded any more")));
        }
    }
    Ok(None)
}
