// Trades a key for a session cookie that no script can read; the key itself is kept nowhere.

const form = document.getElementById("form");
const key = document.getElementById("key");
const problem = document.getElementById("problem");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  const answer = await fetch(new URL("session", import.meta.url), {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ key: key.value.trim() }),
  }).catch(() => null);
  if (answer?.ok) {
    localStorage.setItem("signed-in", "yes");
    location.reload();
    return;
  }
  problem.textContent = answer === null ? "The router does not answer." : answer.status === 401 ? "This is not a valid key." : `The router answered ${answer.status}.`;
  key.select();
});
