//! The verbs: the order of the work, and what is undone when it fails.
//!
//! | file | verb |
//! |---|---|
//! | [`add`] | ADD |
//! | [`del`] | DEL, and the undoing of a failed ADD: there is one way to remove things |
//! | [`check`] | CHECK |
//! | [`gc`] | GC |
//! | [`status`] | STATUS |
//!
//! The modules below this one each know one resource and have errors of their
//! own; here they are combined, and here errors get their CNI codes.

pub mod add;
pub mod check;
pub mod del;
pub mod gc;
pub mod status;

use std::path::Path;

use crate::{
    attachment::{Attachment, Claim, Record, RecordError},
    cni::{AttachmentId, Call, CniError, CniResult, ErrorCode, Plugin},
    datapath,
    gateway::GatewayError,
    link::{LinkError, Netlink, nftables::NftError, sysctl::SysctlError},
    lock::LockError,
    netns::{Netns, NetnsError},
};

/// The code for a second ADD of an attachment that exists: ours (the
/// specification leaves the codes from 100 on to plugins).
pub const ALREADY_ATTACHED: u32 = 101;
/// The code for an ADD that found a table of the node full: ours as well.
pub const FULL: u32 = 102;

/// The plugin, as the protocol sees it.
#[derive(Debug, Default)]
pub struct BpfBridge {
    /// The ADD that the runtime has not been answered yet.
    unanswered: Option<(Claim, Record)>,
}

impl Plugin for BpfBridge {
    fn add(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        netns: &Path,
    ) -> Result<CniResult, CniError> {
        let (result, claim, record) = add::run(call, &attachment(call, id), netns)?;
        self.unanswered = Some((claim, record));
        Ok(result)
    }

    fn added(&mut self) -> Result<(), CniError> {
        if let Some((mut claim, record)) = self.unanswered.take() {
            claim.write(&Record {
                complete: true,
                ..record
            })?;
        }
        Ok(())
    }

    fn check(&mut self, call: &Call<'_>, id: &AttachmentId, netns: &Path) -> Result<(), CniError> {
        check::run(call, &attachment(call, id), netns)
    }

    fn del(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        _netns: Option<&Path>,
    ) -> Result<(), CniError> {
        // An ADD that could not be answered holds the attachment's lock.
        self.unanswered = None;
        del::run(call, &attachment(call, id))
    }

    fn gc(&mut self, call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError> {
        gc::run(call, valid)
    }

    fn status(&mut self, call: &Call<'_>) -> Result<(), CniError> {
        status::run(call)
    }
}

fn attachment<'a>(call: &Call<'a>, id: &'a AttachmentId) -> Attachment<'a> {
    Attachment {
        network: &call.config.name,
        container_id: &id.container_id,
        ifname: &id.ifname,
    }
}

/// Opens the sandbox that `CNI_NETNS` names.
fn open_sandbox(call: &Call<'_>, path: &Path) -> Result<Netns, CniError> {
    let sandbox = Netns::open(path)?;
    if !call.netns_override && sandbox.is_same(&Netns::current()?) {
        return Err(CniError::new(
            ErrorCode::InvalidNetns,
            format!(
                "CNI_NETNS {} is the plugin's own network namespace: it must be the container's \
                 (CNI_NETNS_OVERRIDE=1 allows it)",
                path.display()
            ),
        ));
    }
    Ok(sandbox)
}

/// Whether the host veth of an attachment exists: it dies with the sandbox.
fn is_alive(host: &Netlink, attachment: &Attachment<'_>) -> Result<bool, LinkError> {
    Ok(host
        .link_by_name(&attachment.host_veth())?
        .is_some_and(|link| link.alias == attachment.alias()))
}

/// Several errors as one: the code of the first, the words of all.
fn collect(errors: Vec<CniError>) -> Result<(), CniError> {
    let words: Vec<String> = errors.iter().map(CniError::to_string).collect();
    match errors.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(CniError::new(first.code, words.join("; "))),
    }
}

impl From<NetnsError> for CniError {
    fn from(error: NetnsError) -> Self {
        Self::new(ErrorCode::InvalidNetns, error.to_string())
    }
}

impl From<LinkError> for CniError {
    fn from(error: LinkError) -> Self {
        let code = match &error {
            LinkError::Exists {
                in_sandbox: true, ..
            } => ErrorCode::InvalidEnvironment,
            _ => ErrorCode::Io,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SysctlError> for CniError {
    fn from(error: SysctlError) -> Self {
        Self::new(ErrorCode::Io, error.to_string())
    }
}

impl From<NftError> for CniError {
    fn from(error: NftError) -> Self {
        Self::new(ErrorCode::Io, error.to_string())
    }
}

impl From<LockError> for CniError {
    fn from(error: LockError) -> Self {
        let code = match &error {
            LockError::Held { .. } => ErrorCode::TryAgain,
            LockError::Io { .. } => ErrorCode::Io,
        };
        Self::new(code, error.to_string())
    }
}

impl From<RecordError> for CniError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Lock(error) => error.into(),
            RecordError::Io { .. } => Self::new(ErrorCode::Io, error.to_string()),
        }
    }
}

impl From<datapath::Error> for CniError {
    fn from(error: datapath::Error) -> Self {
        match error {
            datapath::Error::Lock(error) => error.into(),
            datapath::Error::Assigned { .. } => Self::internal(error.to_string()),
            datapath::Error::Interrupted(_) => Self::new(ErrorCode::TryAgain, error.to_string()),
            datapath::Error::Carry { ref source, .. }
                if matches!(**source, datapath::Error::Interrupted(_)) =>
            {
                Self::new(ErrorCode::TryAgain, error.to_string())
            }
            datapath::Error::Full { .. } | datapath::Error::SegmentFull => {
                Self::new(ErrorCode::Other(FULL), error.to_string())
            }
            datapath::Error::Node(error) => Self::new(ErrorCode::InvalidConfig, error.to_string()),
            error => Self::new(ErrorCode::Io, error.to_string()),
        }
    }
}

impl From<GatewayError> for CniError {
    fn from(error: GatewayError) -> Self {
        match error {
            GatewayError::Link(error) => error.into(),
            GatewayError::Sysctl(error) => error.into(),
            GatewayError::Datapath(error) => error.into(),
            GatewayError::Lock(error) => error.into(),
            GatewayError::NotOurs { .. }
            | GatewayError::Orphaned(_)
            | GatewayError::OtherAddress { .. } => {
                Self::new(ErrorCode::InvalidConfig, error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_stopped_may_try_again() {
        let interrupted = || datapath::Error::Interrupted("programs have names");
        let carrying = datapath::Error::Carry {
            from: "v0".to_owned(),
            source: Box::new(interrupted()),
            state: "nothing was changed",
        };
        for error in [interrupted(), carrying] {
            let error = CniError::from(error);
            assert_eq!(error.code, ErrorCode::TryAgain, "{error:?}");
        }
    }
}
