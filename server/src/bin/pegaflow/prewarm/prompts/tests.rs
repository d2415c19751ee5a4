use std::io::Write;

use super::*;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(text.as_bytes()).expect("written");
    file
}

#[test]
fn prompts_are_known_by_what_counts_of_them() {
    let file = file(concat!(
        "{\"prompt\": \"one\", \"id\": 5}\n",
        "\n",
        "{\"id\": 6, \"prompt\": \"one\"}\n",
        "{\"prompt\": \"one\", \"cache_salt\": \"mine\"}\n",
        "{\"prompt_token_ids\": [1, 2]}\n",
        "{\"custom_id\": \"a\", \"body\": {\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}}\n",
        "{\"messages\": [{\"content\": \"x\", \"role\": \"user\"}]}",
    ));
    let mut prompts = PromptFile::read(file.path()).expect("prompts");
    let lines: Vec<u64> = prompts.places.iter().map(|place| place.line).collect();
    assert_eq!((lines, prompts.duplicates), (vec![1, 4, 5, 6], 2));
    let places = prompts.places.clone();
    let again: Vec<Value> = places.iter().map(|place| prompts.prompt(place).expect("there")).collect();
    assert_eq!(again[1], serde_json::json!({ "prompt": "one", "cache_salt": "mine" }));
    assert_eq!(again[3], serde_json::json!({ "messages": [{ "role": "user", "content": "x" }] }));
    assert_eq!(places[0].id.to_string().parse(), Ok(places[0].id));
}

#[test]
fn every_line_that_is_no_prompt_is_named() {
    let file = file(concat!(
        "{\"prompt\": \"one\"}\n",
        "nothing\n",
        "[1]\n",
        "{}\n",
        "{\"prompt\": \"\"}\n",
        "{\"prompt\": \"a\", \"messages\": [{\"role\": \"user\"}]}\n",
        "{\"prompt_token_ids\": [1, -2]}\n",
        "{\"messages\": [{\"content\": \"x\"}]}\n",
        "{\"messages\": [{\"role\": \"user\"}], \"cache_salt\": \"s\"}\n",
    ));
    let error = PromptFile::read(file.path()).expect_err("not prompts");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    for line in 2..=9 {
        assert!(error.message().contains(&format!("line {line}: ")), "{line}: {error}");
    }
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let file = file("{\"prompt\": \"one\"}\n");
    let mut prompts = PromptFile::read(file.path()).expect("prompts");
    std::fs::write(file.path(), "{\"prompt\": \"two\"}\n").expect("written");
    let place = prompts.places[0];
    assert_eq!(prompts.prompt(&place).expect_err("changed").kind(), ErrorKind::InvalidInput);
}
