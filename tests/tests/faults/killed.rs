//! Killed at every point.

use std::collections::HashSet;

use super::*;

/// Kills the call at each of its points from the `first` on, and shows that whatever comes
/// next cleans up.
fn kill_from(
    stage: &Stage<'_>,
    victim: Victim,
    points: &[(usize, String)],
    first: usize,
    then: &[Then],
) -> Result<()> {
    // An ADD that was answered has succeeded; until its device is deleted, a container is
    // attached.
    let number_of = |wanted: &str| {
        let found = points.iter().find(|(_, name)| name == wanted);
        found.map_or(usize::MAX, |(number, _)| *number)
    };
    let attached = match victim {
        Victim::Add => number_of("answer").saturating_add(1)..usize::MAX,
        Victim::FailingAdd => 0..0,
        Victim::Del | Victim::Gc => 0..number_of("delete link"),
    };
    ensure!(first < points.len(), "there is nothing to be killed at");
    for (number, name) in &points[first..] {
        for &next in then {
            let reply = stage.call(victim, &format!("kill:{number}"))?;
            let what = || {
                format!(
                    "{victim:?} killed at point {number}, {name} ({}), then {next:?}",
                    reply.stderr.trim()
                )
            };
            ensure!(reply.status.code().is_none(), "{}: {reply:?}", what());
            stage
                .recover(next, attached.contains(number))
                .with_context(what)?;
        }
    }
    Ok(())
}

/// The points of a call with their numbers.
fn points(stage: &Stage<'_>, victim: Victim) -> Result<Vec<(usize, String)>> {
    let names = stage.list(victim, "point")?;
    ensure!(names.len() > 10, "{names:?}");
    Ok((1..).zip(names).collect())
}

/// How many points are before the first whose name none of the others has: there all is as
/// with the others.
fn known(points: &[(usize, String)], others: &[(usize, String)]) -> usize {
    let known: HashSet<&String> = others.iter().map(|(_, name)| name).collect();
    let is_known = |(_, name): &&(usize, String)| known.contains(name);
    points.iter().take_while(is_known).count()
}

fn plain(node: &Node, before: Before) -> Result<Stage<'_>> {
    Stage::new(node, config(node, &json!({})), false, before)
}

/// Masquerade and published ports, by the programs.
fn outside(node: &Node, before: Before) -> Result<Stage<'_>> {
    let more = json!({"ipMasq": true, "ipMasqExempt": ["192.0.2.0/24"]});
    Stage::new(node, config(node, &more), true, before)
}

fn nftables(node: &Node, before: Before) -> Result<Stage<'_>> {
    // Others would have made the chain, and keep it.
    ensure!(before == Before::Empty);
    let more = json!({"ipMasq": true, "ipMasqBackend": "nftables"});
    Stage::new(node, config(node, &more), false, before)
}

/// Kills calls at all their points, with and without another pod on the node.
fn killed_everywhere(victim: Victim) -> Result<()> {
    let node = node()?;
    let stage = plain(&node, Before::Inhabited)?;
    let points = points(&stage, victim)?;
    kill_from(&stage, victim, &points, 0, &Then::ALL)
}

/// Kills calls of a network of which more is to be done.
fn killed_where_more_is_done(
    network: impl Fn(&Node, Before) -> Result<Stage<'_>>,
    before: Before,
    victim: Victim,
) -> Result<()> {
    let plain = points(&plain(&node()?, Before::Inhabited)?, victim)?;
    let node = node()?;
    let stage = network(&node, before)?;
    let points = points(&stage, victim)?;
    kill_from(&stage, victim, &points, known(&points, &plain), &Then::ALL)
}

#[test]
fn an_add() -> Result<()> {
    killed_everywhere(Victim::Add)
}

#[test]
fn a_del() -> Result<()> {
    killed_everywhere(Victim::Del)
}

#[test]
fn a_gc() -> Result<()> {
    killed_everywhere(Victim::Gc)
}

#[test]
fn an_add_that_is_undone() -> Result<()> {
    let node = node()?;
    let stage = plain(&node, Before::Inhabited)?;
    let add = points(&stage, Victim::Add)?;
    let undone = points(&stage, Victim::FailingAdd)?;
    // Those before are an ADD's.
    let begun = add.iter().zip(&undone).take_while(|(a, b)| a == b).count();
    kill_from(&stage, Victim::FailingAdd, &undone, begun, &Then::ALL)
}

#[test]
fn an_add_that_publishes_and_masquerades() -> Result<()> {
    killed_where_more_is_done(outside, Before::Inhabited, Victim::Add)
}

#[test]
fn a_del_that_publishes_and_masquerades() -> Result<()> {
    killed_where_more_is_done(outside, Before::Inhabited, Victim::Del)
}

#[test]
fn a_gc_that_publishes_and_masquerades() -> Result<()> {
    killed_where_more_is_done(outside, Before::Inhabited, Victim::Gc)
}

#[test]
fn an_add_by_nftables() -> Result<()> {
    killed_where_more_is_done(nftables, Before::Empty, Victim::Add)
}

#[test]
fn the_last_del_by_nftables() -> Result<()> {
    killed_where_more_is_done(nftables, Before::Empty, Victim::Del)
}

#[test]
fn a_gc_by_nftables() -> Result<()> {
    killed_where_more_is_done(nftables, Before::Empty, Victim::Gc)
}

#[test]
fn the_first_add_of_a_node() -> Result<()> {
    let node = node()?;
    let later = points(&plain(&node, Before::Inhabited)?, Victim::Add)?;
    let node = self::node()?;
    let stage = plain(&node, Before::Fresh)?;
    let points = points(&stage, Victim::Add)?;
    // Most of these take a load of the programs each time: half of what may come next
    // after one point, the other half after the next.
    let first = known(&points, &later);
    for number in first..points.len() {
        let then = match number % 2 {
            0 => [Then::Del, Then::AddOther],
            _ => [Then::Gc, Then::AddSame],
        };
        kill_from(&stage, Victim::Add, &points[..=number], number, &then)?;
    }
    Ok(())
}

#[test]
fn an_add_whose_addresses_another_plugin_gives() -> Result<()> {
    let node = node()?;
    let ipam = "another-local";
    node.within(|| {
        let stock = Path::new(Node::STOCK_PLUGINS).join("host-local");
        Ok(symlink(stock, Path::new(Node::CNI_PATH).join(ipam))?)
    })?;
    let mut config = config(&node, &json!({}));
    // Debian's plugins know no later version, and this one knows no GC.
    config["cniVersion"] = json!("1.0.0");
    config["ipam"]["type"] = json!(ipam);
    let stage = Stage::new(&node, config, false, Before::Inhabited)?;
    let points = points(&stage, Victim::Add)?;
    let given = points
        .iter()
        .position(|(_, name)| name.starts_with("ADD of"));
    let given = given.context("the plugin was not called")?;
    let then = [Then::Del, Then::AddSame];
    kill_from(&stage, Victim::Add, &points, given, &then)
}
