//! GC: removes what belongs to no valid attachment of the network.

use std::collections::HashSet;

use crate::{
    attachment::{self, Attachment, Claim, RecordError},
    cni::{AttachmentId, Call, CniError, ErrorCode},
    datapath::Datapath,
    gateway,
    ipam::Ipam,
    link::Netlink,
    masquerade, uplinks,
};

use super::{collect, del};

/// Removes every attachment of the network that is not among `valid`, and then
/// the addresses that belong to none.
pub(super) fn run(call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError> {
    let known: HashSet<(&str, &str)> = valid
        .iter()
        .map(|id| (id.container_id.as_str(), id.ifname.as_str()))
        .collect();
    let mut errors = Vec::new();
    let recorded = attachment::recorded(&call.config.name).unwrap_or_else(|error| {
        errors.push(error.into());
        Vec::new()
    });
    let mut busy = Vec::new();
    for (container_id, ifname) in &recorded {
        if known.contains(&(container_id.as_str(), ifname.as_str())) {
            continue;
        }
        let attachment = Attachment {
            network: &call.config.name,
            container_id,
            ifname,
        };
        match remove(&attachment, Attachment::try_claim_existing) {
            Err(error) if error.code == ErrorCode::TryAgain => busy.push(attachment),
            removed => errors.extend(removed.err()),
        }
    }
    errors.extend(remove_strays(call, valid).err());
    errors.extend(Ipam::of(call).gc(call, valid).err());
    // Whoever works on one of them may hang: nothing else is to wait for that.
    for attachment in busy {
        errors.extend(remove(&attachment, Attachment::claim_existing).err());
    }
    collect(errors)
}

/// Removes what nobody has a record of: host veths by their alias, and then
/// everything that the datapath has of devices that are gone.
fn remove_strays(call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError> {
    let network = &call.config.name;
    let valid: HashSet<String> = valid
        .iter()
        .map(|id| super::attachment(call, id).alias())
        .collect();
    let host = Netlink::host()?;
    for link in host.links()? {
        if attachment::is_alias_in(network, &link.alias) && !valid.contains(&link.alias) {
            host.delete(link.index)?;
        }
    }
    gateway::sweep(&host)?;
    masquerade::sweep(&host, call.config)?;
    match Datapath::open()? {
        Some(datapath) => uplinks::follow(&host, &datapath, call.config, || {
            attachment::outside(&call.config.name)
        }),
        None => Ok(()),
    }
}

/// Removes one attachment but for its addresses, which are given back together.
fn remove<'a>(
    attachment: &Attachment<'a>,
    claim: impl FnOnce(&Attachment<'a>) -> Result<Option<Claim>, RecordError>,
) -> Result<(), CniError> {
    if let Some(claim) = claim(attachment)? {
        del::unplug(attachment, claim.record())?;
        claim.remove()?;
    }
    Ok(())
}
