//! Another build of the same layout.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use bpf_bridge_tests::{Node, Pod};

use crate::{another_plugin, install, is_well, layouts, links, load::Stage, program_of, upgrade};

/// Several upgrades in a row, while everything flows.
fn under_load(xdp: bool) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, xdp)?;
    let pods = [&stage.server, &stage.client];
    // What is lost without an upgrade is not the upgrade's fault.
    stage.under_load(true, || {
        Ok(std::thread::sleep(std::time::Duration::from_secs(1)))
    })?;
    stage.under_load(true, || {
        for number in 1..=3 {
            let before = hooks(&node, &pods)?;
            install(&node, &another_plugin(number)?)?;
            // Old programs are as good as new ones, whoever asks.
            is_well(&stage.network, &pods)?;
            let words = upgrade(&node)?;
            ensure!(words.contains("in use on 3 ports"), "{words}");
            let after = hooks(&node, &pods)?;
            ensure!(
                before.keys().eq(after.keys())
                    && before.iter().all(|(hook, program)| after[hook] != *program),
                "{before:?} became {after:?}"
            );
            is_well(&stage.network, &pods)?;
        }
        Ok(())
    })?;
    let words = upgrade(&node)?;
    ensure!(
        words.contains("the programs are those of this binary"),
        "{words}"
    );
    stage.carries_everything()?;
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    for pod in pods {
        stage.network.del(pod.attachment())?;
    }
    Ok(())
}

/// The program of every hook that is in use.
fn hooks(node: &Node, pods: &[&Pod]) -> Result<BTreeMap<String, u64>> {
    let mut all = links(node, "v1")?;
    for pod in pods {
        all.insert(pod.host_veth()?.to_owned(), program_of(node, pod)?);
    }
    Ok(all)
}

#[test]
fn nothing_is_lost() -> Result<()> {
    under_load(false)
}

#[test]
fn nothing_is_lost_with_xdp() -> Result<()> {
    under_load(true)
}
