use super::*;
use clap::ArgAction;

fn command() -> Command {
    let size = |name: &'static str| Arg::new(name).long(name).env(format!("PEGA_TEST_{}", name.to_uppercase()));
    Command::new("test")
        .arg(Arg::new("config").long("config").env("PEGA_TEST_CONFIG"))
        .arg(size("count").value_parser(clap::value_parser!(u64).range(1..=64)).default_value("4"))
        .arg(size("mode").value_parser(["fast", "slow"]).default_value("fast"))
        .arg(size("write-budget"))
        .arg(size("drive").action(ArgAction::Append).value_delimiter(','))
        .arg(size("huge").value_parser(clap::value_parser!(bool)).action(ArgAction::Set).default_value("false"))
        .arg(Arg::new("validate").long("validate").action(ArgAction::SetTrue))
}

fn read(text: &str) -> (SettingsFile, Vec<String>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("test.toml");
    std::fs::write(&path, text).expect("written");
    let mut problems = Vec::new();
    let file = SettingsFile::read(&path, &command(), &mut problems);
    let prefix = format!("{}:", path.display());
    let problems = problems.iter().map(|problem| problem.strip_prefix(&prefix).unwrap_or(problem).to_owned()).collect();
    (file, problems)
}

fn effective(file: &SettingsFile, flags: &[&str]) -> Vec<(String, Vec<String>, Source)> {
    let matches = file.under(command()).try_get_matches_from([&["test"], flags].concat()).expect("good flags");
    let settings = SettingsFile::effective(Some(file), &command(), &matches);
    settings.into_iter().map(|setting| (setting.name, setting.values, setting.source)).collect()
}

#[test]
fn flags_outrank_the_file_and_the_file_the_defaults() {
    let (file, problems) = read("# one\ncount = 8\n\nhuge = true\ndrive = [\"/a=1GiB\", \"/b=2GiB\"]\n");
    assert!(problems.is_empty(), "{problems:?}");
    let all = effective(&file, &["--mode", "slow", "--huge=false"]);
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        all,
        [
            ("count".into(), owned(&["8"]), Source::File(2)),
            ("mode".into(), owned(&["slow"]), Source::Flag),
            ("write_budget".into(), owned(&[]), Source::Default),
            ("drive".into(), owned(&["/a=1GiB", "/b=2GiB"]), Source::File(5)),
            ("huge".into(), owned(&["false"]), Source::Flag),
        ]
    );
    let (empty, _) = read("");
    assert_eq!(effective(&empty, &[])[0], ("count".into(), owned(&["4"]), Source::Default));
}

#[test]
fn every_problem_is_named_with_its_line() {
    let text =
        "count = 65\nmode = \"slwo\"\ncuont = 3\nwrite-budget = \"x\"\nhuge = 2026-01-01\n[nvme]\npath = \"/x\"\n";
    let (file, problems) = read(text);
    let expected = [
        "1: count: '65' can not be used: 65 is not in 1..=64",
        "2: mode: 'slwo' can not be used; give one of fast, slow",
        "3: cuont: there is no such setting; did you mean 'count'?",
        "4: 'write-budget' is written 'write_budget' here",
        "5: huge: a value of type datetime is not understood",
        "6: nvme: settings are not in sections",
    ];
    let mut sorted = problems.clone();
    sorted.sort();
    for (problem, expected) in sorted.iter().zip(expected) {
        assert!(problem.trim_start().starts_with(expected), "{problem}, not {expected}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    assert!(file.entries.is_empty());
}

#[test]
fn what_is_no_setting_and_no_toml_is_refused() {
    let (_, problems) = read("config = \"x\"\nvalidate = true\nhelp = 1\n");
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems.iter().all(|problem| problem.contains("there is no such setting")), "{problems:?}");
    let (file, problems) = read("count = 8\nmode = \nhuge = true\n");
    assert!(problems.iter().all(|problem| problem.starts_with("2: ")) && !problems.is_empty(), "{problems:?}");
    assert!(file.entries.iter().any(|entry| entry.name == "count"), "the rest is used");
    let mut problems = Vec::new();
    SettingsFile::read(Path::new("/nowhere/test.toml"), &command(), &mut problems);
    assert!(problems[0].starts_with("/nowhere/test.toml: cannot be read"), "{problems:?}");
    let (_, problems) = read(&"# long\n".repeat(200_000));
    assert!(problems[0].contains("has at most 1048576"), "{problems:?}");
}
