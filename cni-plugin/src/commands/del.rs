//! DEL: removes what there is of an attachment, whoever asks and however often.
//!
//! It needs the names alone. The host veth's name follows from them, the record
//! has the rest, and what is in neither does not exist. An error stops nothing:
//! all are told at the end.

use crate::{
    attachment::{Attachment, Claim, Record},
    cni::{Call, CniError},
    datapath::{self, Datapath},
    gateway,
    ipam::Ipam,
    link::{Link, LinkError, Netlink},
    masquerade, ports,
};

use super::collect;

/// Removes the attachment and gives its addresses back.
pub(super) fn run(call: &Call<'_>, attachment: &Attachment<'_>) -> Result<(), CniError> {
    let mut errors = Vec::new();
    let claim = attachment.claim_existing().unwrap_or_else(|error| {
        errors.push(error.into());
        None
    });
    // Of an attachment that somebody works on, nothing may be touched.
    collect(errors)?;
    collect(remove(call, attachment, claim))
}

/// Removes the attachment, which `claim` locks if it was recorded.
///
/// The device goes first, with everything that is in the sandbox: from then on
/// nobody can use what is removed after it. The addresses go last, so that nobody
/// gets them who could meet their former owner.
pub(super) fn remove(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    claim: Option<Claim>,
) -> Vec<CniError> {
    let mut errors = Vec::new();
    let record = claim.as_ref().and_then(Claim::record).cloned();
    match unplug(attachment, record.as_ref()) {
        // While anything is left of what it tells, so is the record.
        Err(error) => errors.push(error),
        Ok(()) => errors.extend(
            claim
                .and_then(|claim| claim.remove().err())
                .map(CniError::from),
        ),
    }
    errors.extend(Ipam::of(call).del(call, attachment).err());
    errors
}

/// Removes the devices and what the datapath knows of them.
pub(super) fn unplug(attachment: &Attachment<'_>, record: Option<&Record>) -> Result<(), CniError> {
    let host = Netlink::host()?;
    let link = host_veth(&host, attachment, record)?;
    if let Some(link) = &link {
        host.delete(link.index)?;
    }
    match (record, link) {
        // It never came to join a segment, nor perhaps to load the programs.
        (Some(Record { segment: 0, .. }), _) | (None, None) => Ok(()),
        (Some(record), _) => {
            // The locks in the order in which an ADD takes them.
            let _lock = gateway::lock(&record.bridge)?;
            let mut datapath = known(Datapath::open())?;
            let mut nat = match &datapath {
                Some(datapath) if record.outside().is_needed() => datapath.nat()?,
                _ => None,
            };
            if let Some(nat) = &mut nat {
                ports::withdraw(nat, record)?;
            }
            masquerade::end(&host, nat.as_mut(), attachment.network, record)?;
            drop(nat);
            match &mut datapath {
                Some(datapath) => Ok(datapath.remove_port(
                    record.host_ifindex,
                    record.segment,
                    record.mac,
                    &record.addresses,
                )?),
                None => Ok(()),
            }
        }
        // The record was lost: the tables alone tell which segment it was in.
        (None, Some(link)) => match known(Datapath::open_alone())? {
            Some(mut datapath) => Ok(datapath.remove_dead_port(link.index)?),
            None => Ok(()),
        },
    }
}

/// The datapath, unless a newer version's maps are in use. What they have of an attachment
/// is beyond this one; that version's GC removes it, or whoever removes the pins when
/// the last pod is gone, which only DELs that succeed can bring about.
#[expect(
    clippy::print_stderr,
    reason = "stderr is where a plugin's warnings go; stdout is the answer"
)]
fn known(opened: Result<Option<Datapath>, datapath::Error>) -> Result<Option<Datapath>, CniError> {
    match opened {
        Err(newer @ datapath::Error::Newer { .. }) => {
            eprintln!("bpf-bridge: warning: entries of the attachment are left: {newer}");
            Ok(None)
        }
        opened => Ok(opened?),
    }
}

/// The host veth: by its name, or under another name by its record.
fn host_veth(
    host: &Netlink,
    attachment: &Attachment<'_>,
    record: Option<&Record>,
) -> Result<Option<Link>, LinkError> {
    let recorded = record.map(|record| record.host_ifindex);
    let named = host
        .link_by_name(&attachment.host_veth())?
        // Without an alias it is one whose ADD was killed at once: the name is
        // proof enough.
        .filter(|link| {
            link.alias.is_empty()
                || link.alias == attachment.alias()
                || Some(link.index) == recorded
        });
    match (named, recorded) {
        (None, Some(index)) => Ok(host
            .link_by_index(index)?
            .filter(|link| link.alias == attachment.alias())),
        (named, _) => Ok(named),
    }
}
