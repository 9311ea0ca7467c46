//! File systems that are full, read-only or gone.

use std::io::Write as _;

use super::*;

const STORE: &str = "/var/lib/cni";
const RUN: &str = "/run/bpf-bridge";

/// A node on which pods were.
fn empty(node: &Node) -> Result<Stage<'_>> {
    Stage::new(node, config(node, &json!({})), false, Before::Empty)
}

/// The ADD fails, for this reason, and nothing but files that all share is left of it.
fn fails(stage: &Stage<'_>, words: &[&str]) -> Result<()> {
    let error = stage.network.add(&stage.victim.1);
    let error = format!("{:#}", error.err().context("the ADD succeeded")?);
    for word in words {
        ensure!(error.contains(word), "no {word:?} in {error}");
    }
    ensure!(!error.contains("cleaning up"), "{error}");
    is_gone(stage)
}

fn is_gone(stage: &Stage<'_>) -> Result<()> {
    ensure!(stage.victim.0.device_names()? == ["lo"]);
    let seen = Snapshot::exact(stage.node)?;
    for word in ["victim", "networks/net/10.77.0.2 ", "networks/net/fd77::2 "] {
        let left = seen.matching(word);
        ensure!(left.is_empty(), "left behind: {left:?}");
    }
    // If there are any maps.
    for map in ["PORTS", "ENDPOINTS", "NEIGHBORS", "MEMBERS", "STATS"] {
        let map = format!("maps/{map} ");
        let (before, now) = (stage.without.seen.matching(&map), seen.matching(&map));
        ensure!(now.is_empty() || now == before, "{now:?}, not {before:?}");
    }
    Ok(())
}

/// Mounts an ever larger file system until an ADD has room in it.
fn grows(directory: &str) -> Result<()> {
    let node = node()?;
    let stage = empty(&node)?;
    for inodes in 1.. {
        node.run(&format!(
            "mount -t tmpfs -o nr_inodes={inodes} tmpfs {directory}"
        ))?;
        let room = match stage.add() {
            Ok(()) => true,
            Err(error) => {
                let error = format!("{error:#}");
                let what = || format!("room for {inodes} files: {error}");
                ensure!(error.contains("No space left on device"), "{}", what());
                ensure!(error.contains(directory), "{}", what());
                is_gone(&stage).with_context(what)?;
                false
            }
        };
        // Whatever there was room for.
        stage.network.del(&stage.victim.1)?;
        is_gone(&stage)?;
        node.run(&format!("umount {directory}"))?;
        if room {
            ensure!(inodes > 4, "there was room for it in {inodes} files");
            break;
        }
    }
    stage.add()?;
    stage.clean()
}

#[test]
fn a_store_without_room_for_files() -> Result<()> {
    grows(STORE)
}

#[test]
fn no_room_for_records_and_locks() -> Result<()> {
    grows(RUN)
}

#[test]
fn a_store_without_room_for_a_lease() -> Result<()> {
    let node = node()?;
    node.run(&format!("mount -t tmpfs -o size=256k tmpfs {STORE}"))?;
    let stage = empty(&node)?;
    stage.add()?;
    node.within(|| {
        let mut file = fs::File::create("/var/lib/cni/full")?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(())
    })?;
    let error = stage.network.add(&stage.other.1);
    let error = format!("{:#}", error.err().context("the ADD succeeded")?);
    ensure!(error.contains("No space left on device"), "{error}");
    ensure!(error.contains("/var/lib/cni/networks/net"), "{error}");
    ensure!(stage.other.0.device_names()? == ["lo"]);
    // What lives can go all the same, and then there is room again.
    stage.network.check(&stage.victim.1)?;
    stage.network.del(&stage.victim.1)?;
    is_gone(&stage)?;
    node.run("rm /var/lib/cni/full")?;
    stage.ensure_like(&stage.without)?;
    stage.network.add(&stage.other.1)?;
    stage.ensure_like(&stage.with_other)
}

#[test]
fn a_store_that_is_read_only() -> Result<()> {
    let node = node()?;
    let stage = empty(&node)?;
    node.run("mount -o remount,ro /var/lib/cni")?;
    fails(
        &stage,
        &["Read-only file system", "/var/lib/cni/networks/net"],
    )?;
    stage.network.del(&stage.victim.1)?;
    node.run("mount -o remount,rw /var/lib/cni")?;
    stage.ensure_like(&stage.without)?;

    // All of a pod goes but its lease, which the error names; the next DEL has it.
    for again in [Then::Del, Then::Gc] {
        stage.add()?;
        node.run("mount -o remount,ro /var/lib/cni")?;
        let error = stage.network.del(&stage.victim.1);
        let error = format!("{:#}", error.err().context("the DEL succeeded")?);
        ensure!(error.contains("Read-only file system"), "{error}");
        ensure!(stage.victim.0.device_names()? == ["lo"]);
        let seen = Snapshot::take(&node)?;
        ensure!(seen.matching("attachments/net/victim").is_empty());
        ensure!(seen.matching("networks/net/10.").len() == 1);
        node.run("mount -o remount,rw /var/lib/cni")?;
        stage.recover(again, false)?;
    }
    Ok(())
}

#[test]
fn no_bpffs() -> Result<()> {
    let node = node()?;
    let stage = empty(&node)?;
    wipe(&node)?;
    node.run("umount /sys/fs/bpf")?;
    let status = stage.network.status()?.remove(0).failure()?;
    ensure!(status.code == 50, "{status:?}");
    fails(&stage, &["mount -t bpf bpf /sys/fs/bpf"])?;
    stage.network.del(&stage.victim.1)?;
    stage.network.gc(&[])?;
    ensure!(!node.device_names()?.contains(&"cni0".to_owned()));
    node.run("mount -t bpf bpf /sys/fs/bpf")?;
    stage.add()?;
    stage.network.check(&stage.victim.1)
}

#[test]
fn bpffs_that_goes_while_pods_live() -> Result<()> {
    let node = node()?;
    let more = json!({"ipMasq": true});
    let stage = Stage::new(&node, config(&node, &more), true, Before::Inhabited)?;
    stage.add()?;
    let neighbour = stage.neighbour.as_ref().context("no neighbour")?;
    // Who knows whom goes on. Nobody else is found: a table by which programs call each
    // other is emptied by the kernel when its last pin goes.
    for gone in [false, true] {
        if gone {
            node.run("umount /sys/fs/bpf")?;
        }
        stage.victim.0.ping(neighbour.v4()?.into(), 1)?;
        neighbour.ping("10.77.0.1".parse()?, 1)?;
    }
    let status = stage.network.status()?.remove(0).failure()?;
    ensure!(
        status.code == 51 && status.text().contains("/sys/fs/bpf"),
        "{status:?}"
    );
    for mounted in [false, true] {
        let words = match mounted {
            false => "mount -t bpf bpf /sys/fs/bpf",
            true => "ip link delete cni0",
        };
        let error = stage.network.add(&stage.other.1);
        let error = format!("{:#}", error.err().context("the ADD succeeded")?);
        ensure!(error.contains(words), "{error}");
        ensure!(stage.other.0.device_names()? == ["lo"]);
        let seen = Snapshot::take(&node)?;
        ensure!(
            seen.matching("other").is_empty(),
            "{:?}",
            seen.matching("other")
        );
        let leases = seen.matching("networks/net/10.");
        ensure!(leases.len() == if mounted { 1 } else { 2 }, "{leases:?}");
        if !mounted {
            // One goes without, by DEL; the other when there is one again, by GC.
            stage.network.del(&stage.victim.1)?;
            is_gone_but_for_maps(&stage)?;
            node.run("mount -t bpf bpf /sys/fs/bpf")?;
        }
    }
    stage.network.gc(&[])?;
    ensure!(neighbour.device_names()? == ["lo"]);
    // As the error says.
    node.run("ip link delete cni0")?;
    stage.network.add(&stage.other.1)?;
    stage.network.check(&stage.other.1)?;
    stage.other.0.ping("10.77.0.1".parse()?, 1)?;
    // Whatever was there is not.
    stage.network.del(&stage.other.1)?;
    wipe(&node)?;
    let left = Snapshot::take(&node)?;
    let left = left.matching("device ");
    ensure!(left.len() == 3, "lo and the uplink, but there is {left:?}");
    Ok(())
}

fn is_gone_but_for_maps(stage: &Stage<'_>) -> Result<()> {
    ensure!(stage.victim.0.device_names()? == ["lo"]);
    let seen = Snapshot::take(stage.node)?;
    ensure!(
        seen.matching("victim").is_empty(),
        "{:?}",
        seen.matching("victim")
    );
    ensure!(seen.matching("networks/net/10.77.0.2").is_empty());
    Ok(())
}
