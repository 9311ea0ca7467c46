//! Masquerade: what pods send out of the node leaves with the node's address.
//!
//! By the programs on uplinks, which know each pod by its addresses; or by a chain of
//! netfilter, which all pods of a network share that have the same subnets. A chain is
//! made and deleted under the lock of the bridge.

use std::{collections::HashSet, net::IpAddr};

use ipnet::IpNet;

use crate::{
    attachment::{self, Masquerade, Record, hash},
    cni::{CniError, NetworkConfig, config::MasqBackend, result::IpConfig},
    datapath::{
        self, Datapath,
        nat::{Nat, Policy},
    },
    gateway,
    link::{
        Netlink,
        nftables::{self, Chain},
    },
};

/// How long a network's name may be to be part of a chain's, which has 255 bytes at most
/// (`NFT_NAME_MAXLEN` of `linux/netfilter/nf_tables.h`).
const NAME_MAX: usize = 200;
/// The length of what tells the chains of a network apart.
const SUFFIX: usize = 16;

/// What masquerades an attachment with these addresses, if anything does.
pub fn wanted(config: &NetworkConfig, ips: &[IpConfig]) -> Option<Masquerade> {
    let backend = config.ip_masq.filter(|_| !ips.is_empty())?;
    Some(match backend {
        MasqBackend::Ebpf => Masquerade::Ebpf,
        MasqBackend::Nftables => {
            let (subnets, exempt) = (subnets(ips), exempt(config, ips));
            Masquerade::Nftables {
                chain: chain_name(&config.name, &subnets, &exempt),
                rules: nftables::rule_count(&subnets, &exempt),
            }
        }
    })
}

/// The subnets of an attachment, sorted, none twice.
fn subnets(ips: &[IpConfig]) -> Vec<IpNet> {
    sorted(ips.iter().map(|ip| ip.address.trunc()))
}

/// The destinations for which it is not masqueraded: its own subnets, and those that the
/// configuration lists.
fn exempt(config: &NetworkConfig, ips: &[IpConfig]) -> Vec<IpNet> {
    let listed = config.ip_masq_exempt.iter().copied();
    sorted(subnets(ips).into_iter().chain(listed))
}

fn sorted(nets: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    let mut nets: Vec<IpNet> = nets.collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}

/// The name of a network's chain for these subnets.
fn chain_name(network: &str, subnets: &[IpNet], exempt: &[IpNet]) -> String {
    let list = |nets: &[IpNet]| -> String { nets.iter().map(|net| format!("{net} ")).collect() };
    let suffix = hash([network, &list(subnets), &list(exempt)]);
    format!("{}{suffix:016x}", chain_prefix(network))
}

/// What the names of a network's chains begin with.
fn chain_prefix(network: &str) -> String {
    if network.len() > NAME_MAX {
        format!("masquerade-{:016x}-", hash([network]))
    } else {
        format!("masquerade-{network}-")
    }
}

/// Whether a chain is one of a network's, whatever other networks are called.
fn is_chain_of(network: &str, chain: &str) -> bool {
    chain
        .strip_prefix(&chain_prefix(network))
        .is_some_and(|rest| {
            rest.len() == SUFFIX && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

/// Masquerades an attachment, whose record names it already.
///
/// # Errors
///
/// One of its addresses is another pod's, an uplink cannot be served, or netfilter
/// refuses.
pub fn begin(
    host: &Netlink,
    nat: Option<&mut Nat<'_>>,
    config: &NetworkConfig,
    record: &Record,
    ips: &[IpConfig],
) -> Result<(), CniError> {
    match &record.masquerade {
        None => Ok(()),
        Some(Masquerade::Ebpf) => nat.map_or(Ok(()), |nat| claim(host, nat, config, record, ips)),
        Some(Masquerade::Nftables { chain, rules }) => {
            match nftables::chain(chain)? {
                Some(present) if present.rules == *rules => return Ok(()),
                // Somebody has changed it.
                Some(_) => nftables::delete_chain(chain)?,
                None => {}
            }
            Ok(nftables::add_chain(
                chain,
                &subnets(ips),
                &exempt(config, ips),
            )?)
        }
    }
}

/// Lets the programs masquerade an attachment.
fn claim(
    host: &Netlink,
    nat: &mut Nat<'_>,
    config: &NetworkConfig,
    record: &Record,
    ips: &[IpConfig],
) -> Result<(), CniError> {
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

/// Ends that. The attachment's device is gone.
///
/// # Errors
///
/// The tables cannot be used, or netfilter refuses.
pub fn end(
    host: &Netlink,
    nat: Option<&mut Nat<'_>>,
    network: &str,
    record: &Record,
) -> Result<(), CniError> {
    match &record.masquerade {
        None => {}
        Some(Masquerade::Ebpf) => {
            if let Some(nat) = nat {
                for &address in &record.addresses {
                    nat.unmasquerade(address, record.segment, record.host_ifindex)?;
                }
            }
        }
        Some(masquerade @ Masquerade::Nftables { chain, .. }) => {
            for other in attachment::records(network)? {
                if other.masquerade.as_ref() == Some(masquerade)
                    && host.link_by_index(other.host_ifindex)?.is_some()
                {
                    return Ok(());
                }
            }
            nftables::delete_chain(chain)?;
        }
    }
    Ok(())
}

/// Deletes the chains of a network that none of its attachments has.
///
/// # Errors
///
/// Netfilter refuses, or the records cannot be read.
pub fn sweep(host: &Netlink, config: &NetworkConfig) -> Result<(), CniError> {
    let _lock = gateway::lock(&config.bridge)?;
    let chains = match nftables::chains() {
        // It may be that the kernel has no nftables.
        Err(_) if config.ip_masq != Some(MasqBackend::Nftables) => return Ok(()),
        chains => chains?,
    };
    let own = |chain: &Chain| is_chain_of(&config.name, &chain.name);
    if !chains.iter().any(own) {
        return Ok(());
    }
    let mut used = HashSet::new();
    for record in attachment::records(&config.name)? {
        if let Some(Masquerade::Nftables { chain, .. }) = record.masquerade
            && host.link_by_index(record.host_ifindex)?.is_some()
        {
            used.insert(chain);
        }
    }
    for chain in chains.iter().filter(|chain| own(chain)) {
        if !used.contains(&chain.name) {
            nftables::delete_chain(&chain.name)?;
        }
    }
    Ok(())
}

/// What is wrong with an attachment's masquerade, if anything is.
///
/// # Errors
///
/// The tables cannot be read, or netfilter does not tell.
pub fn check(datapath: &Datapath, record: &Record) -> Result<Option<String>, CniError> {
    match &record.masquerade {
        None => Ok(None),
        Some(Masquerade::Ebpf) => {
            let Some(nat) = datapath.nat()? else {
                return Ok(Some(
                    "the programs that masquerade are not loaded".to_owned(),
                ));
            };
            let is_lost = |address: IpAddr| {
                let owner = nat.masqueraded(address, record.segment)?;
                Ok::<_, datapath::Error>(owner != Some(record.host_ifindex))
            };
            for &address in &record.addresses {
                if is_lost(address)? {
                    return Ok(Some(format!("{address} is not masqueraded any more")));
                }
            }
            Ok(None)
        }
        Some(Masquerade::Nftables { chain, rules }) => Ok(match nftables::chain(chain)? {
            Some(present) if present.rules == *rules => None,
            Some(_) => Some(format!(
                "the rules that masquerade the network were changed: the chain {chain:?} of \
                 netfilter's table {:?}",
                nftables::TABLE
            )),
            None => Some(format!(
                "the rules that masquerade the network are missing: the chain {chain:?} of \
                 netfilter's table {:?}",
                nftables::TABLE
            )),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn chains_belong_to_one_network_whatever_the_others_are_called() {
        let (subnets, exempt) = (nets(&["10.1.0.0/16"]), nets(&["10.0.0.0/8"]));
        let long = "x".repeat(250);
        let longer = "x".repeat(251);
        let names = ["net", "net-1", "net-0123456789abcdef", "n", &long, &longer];
        for network in names {
            let chain = chain_name(network, &subnets, &exempt);
            assert!(chain.len() <= 255);
            for other in names {
                assert_eq!(is_chain_of(other, &chain), other == network, "{other}");
            }
        }
    }

    #[test]
    fn other_subnets_have_another_chain() {
        let (one, two) = (nets(&["10.1.0.0/16"]), nets(&["10.2.0.0/16"]));
        let name = |subnets: &[IpNet], exempt: &[IpNet]| chain_name("net", subnets, exempt);
        assert_eq!(name(&one, &two), name(&one, &two));
        assert_ne!(name(&one, &two), name(&two, &one));
        assert_ne!(name(&one, &[]), name(&one, &one));
        assert_ne!(name(&one, &[]), name(&[], &one));
    }
}
